"""The new checkpoint, its report, and their display.

places         places that a user names, checked before the work
staging        all or nothing: a checkpoint is written beside its destination, then renamed
export         writes the checkpoint's files
convert        makes the newest version of an older one, and two-level scales
written_files  which files a checkpoint has
json_file      writes JSON
weight_file    writes safetensors files
report         makes the JSON report beside the weights
outcome        the lines that end a calibration
card           makes the model card, README.md
report_file    reads and checks the JSON report
distributions  the kept distribution of each input
inspection     a checkpoint as a table
page_file      writes a page, or refuses its place before the work
page           the HTML report
"""
