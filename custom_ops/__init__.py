"""The op set of domain `specquant`: schema, reference, packed layouts, kernels and their bindings."""
