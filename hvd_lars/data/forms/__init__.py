"""Forms in which sites keep ImageNet: where each image lies in which file.

One module per form: ``FORM`` finds the files below a root, and scans them.
"""
