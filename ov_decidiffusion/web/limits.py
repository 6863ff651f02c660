"""Limits for visitors of the demo and the server, and this machine's own names."""

MAX_SEED = 2**32 - 1  # the largest that AUTOMATIC1111 draws
MAX_STEPS = 100
QUALITY = 95  # of the JPEG and WebP files that are written
MAX_UPLOAD = 30_000_000  # bytes
MAX_PIXELS = 64_000_000  # of a source picture; resizing one of this size takes 0.6 GB, or 1.1 GB for a WebP
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # EPS would run a program
LOOPBACK = ("127.0.0.1", "localhost", "::1")
