"""What several recipes need: their arguments, installed assets, and what a run measures.

The scripts of a recipe put the folder ``recipes`` on ``sys.path`` and import from here.
"""
