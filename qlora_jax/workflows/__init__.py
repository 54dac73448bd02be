"""What joins the rest: opening a model, training it, merging, describing what is on a disk.

Import from its files, each of which brings in only the groups that it joins.
"""
