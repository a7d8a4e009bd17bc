import os

__version__ = "0.1.0"
os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # ONNX Runtime reports its use to its makers unless told not to before its import
