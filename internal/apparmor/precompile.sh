#!/bin/sh
# Compiles servin-default.profile to the binary policy that is embedded for hosts
# without apparmor_parser. Needs Debian's apparmor package (3.0), no AppArmor in
# the running kernel. The features are those of the 3.0 ABI, which the profile
# names: Linux 5.15 and newer take such a policy and ignore classes they do not
# mediate; classes newer than the ABI (user namespaces, io_uring, mqueue) stay
# unmediated.
set -eu
cd "$(dirname "$0")"
abi=/etc/apparmor.d/abi/3.0
# No configuration, cache or optimisation of this host may show in the result.
apparmor_parser --config-file /dev/null --skip-kernel-load --skip-cache --jobs=0 \
	--policy-features "$abi" --kernel-features "$abi" \
	--ofile "${1:-servin-default.policy}" servin-default.profile
