"""How optimizers are compared: each is tuned under the same budget, then trained on paired seeds.

``descent`` proposes what a search tries next, ``records`` keeps every training, ``harness`` trains
what is missing, ``paired`` and ``tables`` evaluate the results, ``figures`` draws them, ``command``
is the command line. The scripts of a recipe put the folder ``recipes`` on ``sys.path``.
"""
