"""`morphoquant report`: one self-contained HTML file about a checkpoint, made from what calibration recorded."""
