"""`morphoquant report`: one self-contained HTML file about a checkpoint, made from calibration's figures.

content  gathers the content of the page from a checkpoint
figures  draws its pictures
render   fills the template page.html.j2 with them, and writes the file
"""
