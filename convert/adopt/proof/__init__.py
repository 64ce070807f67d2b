"""Which candidate gives a sample's numbers, and how sure each of its choices is."""
