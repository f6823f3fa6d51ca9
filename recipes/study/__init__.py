"""How optimizers are compared: each tuned under one budget, then on seeds that are paired.

``descent`` says what a search tries next, ``records`` keeps every training, ``harness`` trains what
is missing, ``paired`` and ``tables`` say what was found, ``figures`` draws it, ``command`` is the
command line. The scripts of a recipe put the folder ``recipes`` on ``sys.path``.
"""
