"""Code that several recipes share: arguments, installed assets, measurements.

The scripts of a recipe put the folder ``recipes`` on ``sys.path`` and import from here.
"""
