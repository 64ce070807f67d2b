METHOD = "best-of-n"


def command(args):
    raise NotImplementedError
