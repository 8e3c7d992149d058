def find_weights(data_root):
    return None


def missing(data_root):
    return "no weights"


def scores(*a):
    raise NotImplementedError
