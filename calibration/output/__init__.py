"""The new checkpoint, its report, and what shows them. `page/` makes the HTML report.

staging        all or nothing: written beside its place, then renamed
export         writes the checkpoint's files
report         the JSON report beside the weights
distributions  what is kept of each input's distribution
inspection     a checkpoint as a table
"""
