"""The network: backbones, pyramid, heads, and the Detector they make."""
