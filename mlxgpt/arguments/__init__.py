"""The arguments of every verb, one function each; verbs.py says which verb uses which."""
