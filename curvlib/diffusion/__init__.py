"""A small diffusion model of handwritten digits, and ways to make it forget one."""
