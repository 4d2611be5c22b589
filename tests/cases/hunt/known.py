"""Cases of the hunt that are wrong yet, by cause; the list shrinks as causes are mended."""

WRONG_TODAY = frozenset(
    [
        # An op that raises by its data, and a program that catches that: no read is seen.
        "model: a Cholesky factor that fails",
        "model: a class out of range",
        "model: a solver that refuses",
        "model: a gather that fails",
        "model: a scatter that fails",
        "model: a selection that fails",
        "model: a likelihood that fails",
        "loss: a class out of range in the loss",
        # A tensor's memory exchanged by `.data =` is no step.
        "model: data exchanged for centred data",
        "model: data exchanged for flipped data",
        # The noise of `rrelu` is not moved along with its samples where proofs are tried.
        "model: random slopes",
        # Labels that are mixed count as constants of the sample.
        "loss: paths to labels mixed with those of others",
        "loss: paths to labels of others",
        "loss: paths to labels mixed, in one vector",
        # Behind a weak reference, a proxy or a bound method.
        # Names of attributes kept in objects of C.
        # In an object of C, or in a class of a closed book.
        # Classes of leaves: members of enums, tuples, floats, tensors, classes of classes.
        # Attributes of tensors and of scripted modules.
        # Looked up by a name that is data, or in a library's table.
        # Deep, long or large.
        # Iterators, where no holder has them, and where others advance them.
        # What a program writes and depends on later.
        # Caches, and what has been written to files.
        # Settings of the process that nobody reads.
        # Others.
    ]
)

WRONG_THIRD = frozenset(
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
        # No spot checks where derivatives are taken by the model, and predictions by the recording.
        "change: a setting given later, under clipped gradients",
        "change: an array filled again, under clipped gradients",
        # Spot checks look at values alone.
        "change: a layer cut off from gradients, by a setting given later",
        "change: gradients scaled by a setting given later",
        # Made by the program where it is missing, so that it does not depend on what is there.
        "change: a mean of the first batch",
        "change: a scale of the first batch",
        "change: features of the first batch",
        "change: a default that is set where it is missing",
        "change: an attribute that is made where it is missing",
        "change: a trait",
        "change: an annealed weight, started again",
        # What autograd knows of tensors from outside: history, hooks, graphs that are used up.
        "messy: a buffer added to with its history",
        "messy: a sum of losses, with its history",
        "messy: the history of a weight that is made once",
        "messy: weights that are cached for a while",
        "messy: the cache of weights",
        "messy: a state cut from its history",
        "messy: a state decayed in place",
        "messy: a hook after the gradient of a weight",
        # Names that a class or a file does not have yet.
        "change: a setting that a file is given later",
        "change: a number that a class is given later",
        "change: a method that a class is given over its base's",
        "messy: a table that a class makes once",
        "messy: a setting that was not there",
        # Imported inside a function; looked up by `__getattr__` of a file.
        "change: a setting of a file imported where it is used",
        "change: a number imported where it is used",
        "change: a setting that a file looks up for itself",
        "messy: a setting of a file imported where it is used",
        # Code that nobody names: what makes, prints and writes to objects; patterns and formats.
        "change: a global that is read where a class of a table is made",
        "change: a global that is read where a class of a base is made",
        "change: a global that is read where a class of an attribute is made",
        "change: a global that is read after a dataclass is made",
        "change: what the name of an object is made of",
        "change: an attribute in a pattern",
        "change: an attribute in a pattern, by its place",
        "change: an attribute in a format",
        "messy: a list of all objects of a class in a table",
        "messy: a list of all objects of a class with a base",
        "messy: a list of all objects of a class of an attribute",
        "messy: a count of the objects of a dataclass",
        "messy: a count of names",
        "messy: lines printed to an object",
        # Code exchanged in place is not read for what it names.
        "change: code, and then what it reads",
        # What is patched onto classes and into files of others, and bodies of registered ops.
        "change: a method patched onto tensors",
        "change: a global that a method patched onto a layer reads",
        "change: a function of PyTorch that a layer calls",
        "change: a private method of a class of layers",
        "change: a global that the body of an op reads",
        "messy: a count in a method patched onto tensors",
        "messy: a count in the body of an op",
        # Dicts of partials and of functions; slots.
        "change: a keyword of a partial",
        "change: defaults by name, replaced",
        "change: a slot with a name of its class",
        "change: a slot of a kind of dict",
        "messy: a keyword of a partial",
        "messy: a slot with a name of its class",
        "messy: a slot of a kind of dict",
        # Closed books, and the user's files whose names begin as theirs do.
        "change: an attribute of a class in a file with a library's name",
        "change: the rate of an optimizer",
        "change: a tensor of a data set",
        "change: the tensors of a data set",
        "messy: an object of a class in a file with a library's name",
        "messy: a dict of a class in a file with a library's name",
        "messy: an optimizer of one's own",
        "messy: a schedule of one's own",
        "messy: the list of a subset",
        "messy: records of a handler",
        # Objects in files of libraries, and far inside objects of libraries.
        "change: a flag of the command line",
        "change: the centres of a prior",
        # Files.
        "change: a file that is read",
        "change: a file that is there",
        "change: the content of a file in memory",
        "messy: a line added to a file",
        "messy: a file that is made",
        "messy: a file in memory cut off",
        # Modes and settings around a question.
        "change: a mode of functions",
        "change: a mode of ops",
        "change: small numbers flushed",
        # Errors of no words of ours, or blamed on the model: keys, kinds and iterators.
        "change: a number by parameter",
        "change: a mask by parameter",
        "change: a buffer made in inference mode",
        "change: a tensor made in inference mode",
        "change: a conjugated buffer",
        "change: the values of a sparse buffer",
        "change: a sparse buffer, multiplied",
        "change: the values of a sparse tensor",
        "messy: a sparse buffer that is not used",
        "messy: a buffer of sparse rows",
        "messy: a jagged buffer",
        "messy: a buffer made in inference mode that is not used",
        "messy: an object that is not ready",
        "messy: inputs of a class of their own",
        "messy: targets of a teacher in inference mode",
        "messy: sparse inputs",
        "messy: inputs in sparse rows",
        "messy: jagged inputs",
        "messy: inputs of eight bits",
        "messy: a count by parameter",
        "messy: calls of a mock",
        "messy: a row of a table that is read",
        "messy: random numbers of the system",
        "messy: the values of a sparse buffer",
        "messy: a sparse buffer multiplied",
        # Backward passes through a loss, outside of what puts back.
        "messy: norms that a loss notes",
        # Strides, memory, other threads.
        "messy: a buffer turned",
        "messy: a buffer freed for a while",
        "messy: a buffer written to in a pool of threads",
        "messy: a buffer written to in a thread",
        # Generators beside those that are known; arrays but for their entries.
        "messy: seeds that have children",
        "messy: a generator that has children",
        "messy: bits of a generator",
        "messy: a generator that counts",
        "messy: a large array",
        "messy: a locked array",
        "messy: the type of an array",
        # Methods of the user that looking and putting back call.
        "messy: a list that refuses to forget",
        "messy: a dict that makes what is looked at",
    ]
)

WRONG_TODAY |= WRONG_THIRD
