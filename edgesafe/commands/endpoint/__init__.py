"""Commands about endpoints, and the options by which `certify` and `smoke` ask one."""
