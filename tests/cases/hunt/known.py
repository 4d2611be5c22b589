"""Cases of the hunt that are wrong yet, by cause; the list shrinks as causes are mended."""

WRONG_TODAY = frozenset(
    [
        # What the program is given: data by other ways than ops, objects beside it, parameters.
        "change: an array that the inputs lie in, filled again",
        "change: the data of the inputs",
        "change: an array among the inputs",
        "change: an object among the inputs",
        "change: a namespace among the inputs",
        "change: a dataclass among the inputs",
        "change: a set among the inputs",
        "change: an entry of an encoding",
        "change: parameters of a function, by other tensors",
        "change: a parameter more of a function",
        "messy: inputs that require gradients from now on",
        "messy: inputs that get a gradient",
        "messy: inputs that get a hook",
        "messy: inputs given an axis",
        "messy: inputs turned",
        "messy: targets that lose an axis",
        "messy: a dict of inputs that loses an entry",
        "messy: a dict of inputs that gains an entry",
        "messy: a list of inputs that loses an entry",
        "messy: a dict of targets that loses an entry",
        "messy: a dict of targets that gains an entry",
        "messy: an object among the inputs",
        "messy: an array among the inputs",
        "messy: a generator among the inputs",
        "messy: an iterator among the inputs",
        # What autograd knows of tensors from outside: history, hooks, graphs that are used up.
        "messy: a buffer added to with its history",
        "messy: a sum of losses, with its history",
        "messy: the history of a weight that is made once",
        "messy: weights that are cached for a while",
        "messy: the cache of weights",
        "messy: a state cut from its history",
        "messy: a state decayed in place",
        "messy: a hook after the gradient of a weight",
        # What is patched onto classes and into files of others, and bodies of registered ops.
        "messy: a count in the body of an op",
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
        # Backward passes through a loss, outside of what puts back.
        "messy: norms that a loss notes",
        # Whole numbers and booleans that are drawn are not moved along with their samples.
        "model: one token each, drawn",
        # Noise of no sample counts as theirs where one of its axes has their number.
        "model: weights drawn",
        "model: weights drawn thrice",
        "model: weights dropped",
        "model: a projection drawn",
        "model: a table dropped",
        "model: a kernel drawn",
        "model: features of Fourier, drawn",
        # Noise that is written into a part of something, or through ``.data``, is lost sight of.
        "model: noise into the data of a buffer",
        "model: noise into a part of a buffer",
        "model: noise into every second column",
        "model: noise in place of two columns",
        "model: noise row by row into a buffer",
        # All draws of one law have one key: which of them it is does not count.
        "model: noise drawn once, or twice",
        # A sum over all samples and one over some of them make one scalar of both.
        "own: own: labels for half, certainty for all",
        "own: own: next word, and a penalty on all",
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
        # A copy into less precision is no copy.
        "model: half of the rows kept in bfloat16",
        "model: half of the rows kept in float16",
        "model: the last rows from a cache in float16",
        "model: a product into less precision",
        # Groups of unequal size, and statistics of groups that are predictions themselves.
        "model: ghost batch norm of four and two",
        "model: centred in parts of four and two",
        "model: pairs averaged, and given back to both",
        "model: the mean of a group for all of it",
        # A scan or a search leaves of all ranks one number, or so many without names.
        "model: a Lorenz curve",
        "model: sums of ranks from above",
        "model: ranks smoothed",
        "model: the spectrum of ranks",
        "model: ranks summed by logarithms",
        "model: a rank by searching",
        "model: a rank by buckets",
        "model: normal scores",
        # What is read as a whole counts as one number.
        "size: quartiles as buckets",
        "size: sorted means as buckets",
        "size: a matrix that is solved",
        "size: a factor that is solved",
        "size: a triangle that is solved",
        "size: a matrix as an image",
        "size: weights of classes",
        "size: a kernel with three taps",
        # Reductions of nothing raise in their rule.
        "model: a penalty on no terms",
        "model: no tokens in front",
        "model: no samples left",
        "model: no mask at all",
    ]
)
