"""What the two papers say, as data: their claims (claims.csv) and every number that they printed (tables/)."""
