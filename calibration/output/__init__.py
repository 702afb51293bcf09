"""The new checkpoint, its report, and what shows them.

staging        all or nothing: written beside its place, then renamed
export         writes the checkpoint's files
convert        makes the newest version of an older one, and two-level scales
json_file      writes JSON
report         the JSON report beside the weights
report_file    that file as it is read
distributions  what is kept of each input's distribution
inspection     a checkpoint as a table
page           the HTML report
"""
