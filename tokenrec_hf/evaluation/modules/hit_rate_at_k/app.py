"""The Space of HR@K: the demo of `evaluate`."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("hit_rate_at_k.py"))
