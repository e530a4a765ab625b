"""Published numbers, tables, figures, the scorecard and the report page."""
