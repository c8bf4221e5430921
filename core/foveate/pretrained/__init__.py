"""Opening checkpoints of the transformers library and preparing pictures for them: shared by plugins.

Nothing heavy is imported here. :mod:`.loading` opens a registry row, :mod:`.weights` reads files without running
code, :mod:`.preprocess` does what ``preprocessor_config.json`` says, :mod:`.sites` finds declared sites in the
live model, :mod:`.choices` and :mod:`.features` are targets of classifiers and of encoders without a head.
"""
