"""Home-made GPTs as other people write them, to see whether ``mlxgpt adopt`` finds out what they are.

Written without a look at convert/adopt: choices.py picks what each animal is, every pair of choices at least once;
names.py has naming styles; weights.py draws weights and lays them out; in_torch.py, in_mlx.py and in_numpy.py compute,
each in its own way; animals.py writes the file and the sample that an adoption is given.
"""
