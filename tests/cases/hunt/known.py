"""Cases of the hunt that are wrong yet, by cause; the list shrinks as causes are mended."""

WRONG_TODAY = frozenset(
    [
        # What the program is given: data by other ways than ops, objects beside it, parameters.
        # Spot checks look at values alone.
        # Made by the program where it is missing, so that it does not depend on what is there.
        # What autograd knows of tensors from outside: history, hooks, graphs that are used up.
        # Names that a class or a file does not have yet.
        # Imported inside a function; looked up by `__getattr__` of a file.
        # Code that nobody names: what makes, prints and writes to objects; patterns and formats.
        # Code exchanged in place is not read for what it names.
        # What is patched onto classes and into files of others, and bodies of registered ops.
        "messy: a count in the body of an op",
        # Dicts of partials and of functions; slots.
        # Closed books, and the user's files whose names begin as theirs do.
        "change: the rate of an optimizer",
        "change: a tensor of a data set",
        "change: the tensors of a data set",
        "messy: an optimizer of one's own",
        "messy: a schedule of one's own",
        "messy: the list of a subset",
        # Objects in files of libraries, and far inside objects of libraries.
        "change: a flag of the command line",
        "change: the centres of a prior",
        # Files.
        "change: a file that is read",
        "change: a file that is there",
        "messy: a line added to a file",
        "messy: a file that is made",
        # Modes and settings around a question.
        "change: a mode of functions",
        "change: a mode of ops",
        "change: small numbers flushed",
        # Errors of no words of ours, or blamed on the model: keys, kinds and iterators.
        # Backward passes through a loss, outside of what puts back.
        "messy: norms that a loss notes",
        # Strides, memory, other threads.
        # Generators beside those that are known; arrays but for their entries.
        # Methods of the user that looking and putting back call.
        # Whole numbers and booleans that are drawn are not moved along with their samples.
        # All draws of one law have one key: which of them it is does not count.
        "model: noise drawn once, or twice",
        # A sum over all samples and one over some of them make one scalar of both.
        # Second derivatives of a function of scalars need no rank of one.
        # The width of a one-hot is read from the labels, and counts as a check of them.
        # Sizes of selections that PyTorch reads itself.
        "model: ones expanded as the outliers",
        "model: resized as the outliers",
        # Old constructors read tensors in a list unseen.
        "model: a count in a LongTensor",
        "model: a count in an IntTensor",
        "model: a count in a new tensor of its kind",
        "model: outliers counted in a LongTensor",
        "model: outliers in a BoolTensor",
        "loss: over a count in a LongTensor",
    ]
)
