"""What vLLM 0.33.0 pins of the distributions that this package needs too: name -> (version, extras)."""

PINS = {
    "nvidia-cutlass-dsl": ("4.8.0", {"cu13"}),
    "apache-tvm-ffi": ("0.1.11", set()),
    "torch": ("2.14.0", set()),
    "quack-kernels": ("0.6.5", set()),
}
