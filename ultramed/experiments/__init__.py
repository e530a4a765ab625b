"""What the papers did, as verbs that notebooks call: medalpaca.py, ultramedical.py. A method that trains or asks says so."""
