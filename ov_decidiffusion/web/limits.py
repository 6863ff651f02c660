"""What the demo and the server let their visitors ask for, and which names are this machine's own."""

MAX_SEED = 2**32 - 1  # the largest that AUTOMATIC1111 draws
MAX_STEPS = 100
QUALITY = 95  # of the JPEG and WebP files that are written
MAX_UPLOAD = 30_000_000  # bytes
MAX_PIXELS = 64_000_000  # of a picture to start from, which takes 0.6 GB to bring into shape, and 1.1 GB as a WebP
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # EPS would run a program
LOOPBACK = ("127.0.0.1", "localhost", "::1")
