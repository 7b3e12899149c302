"""Bottleneck adapters: small networks around a layer's forward, one module a method."""
