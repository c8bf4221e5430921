"""What plugins and their tests can use: conformance kits, a tiny source, synthetic pictures, slow oracles."""
