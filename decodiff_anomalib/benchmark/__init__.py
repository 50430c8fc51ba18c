"""Compare detectors under one protocol, and measure weights by the published one.

========== =====================================================================
module     contents
========== =====================================================================
command    ``decodiff benchmark``; each run is executed in a child process
grid       configuration to runs, validated before anything is run
record     one run as plain data, its folder and its record
run        train, test and measure one run (the child process)
costs      time, memory and the change of normal images
report     collect the results, summarise them, write tables
plots      pictures of the results
baselines  weights and equipment of Anomalib's models without a network
teacher    distillation of EfficientAd's teacher
reproduce  ``decodiff reproduce``
========== =====================================================================

Nothing is imported here, so that a child process loads only what its run needs.
"""
