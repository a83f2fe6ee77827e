"""From files to Batches: annotations, images, the sampler, and two loaders with the same result."""
