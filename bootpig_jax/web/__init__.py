"""Web pages: one to draw with, one to compare two methods' pictures by votes."""

import os

# Before gradio is imported by any module here: the pages tell nobody that they are used.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
