"""`morphoquant report`: one self-contained HTML file about a checkpoint, made from what calibration recorded.

content  what the page shows, gathered from a checkpoint
figures  draws its pictures
render   fills the template page.html.j2 with them, and writes the file
"""
