"""What the demo and the server let their visitors ask for, and which names are this machine's own."""

MAX_SEED = 2**31 - 1
MAX_STEPS = 100
MAX_UPLOAD = 30_000_000  # bytes
MAX_PIXELS = 64_000_000  # of a picture to start from, which takes 0.5 GB to bring into shape
LOOPBACK = ("127.0.0.1", "localhost", "::1")
