"""C++ sources of the CPU kernels, compiled on first use by `tokenzoo.kernels._native`."""
