package dockerapi

import (
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// version is the minor number of a 1.x API version.
type version int

// The range of API versions served. A request without a version gets the newest.
const (
	minVersion version = 24
	maxVersion version = 56
)

// MinAPIVersion and MaxAPIVersion are the range served, as Docker writes versions.
const (
	MinAPIVersion = "1.24"
	MaxAPIVersion = "1.56"
)

func (v version) String() string { return "1." + strconv.Itoa(int(v)) }

// cutVersion takes the "/v1.47" off the front of a request path. A path
// without one is returned as it is, with the newest version.
func cutVersion(path string) (v version, rest string, err error) {
	if len(path) < 3 || path[0] != '/' || path[1] != 'v' || path[2] < '0' || path[2] > '9' {
		return maxVersion, path, nil
	}
	s := path[2:]
	rest = "/"
	if i := strings.IndexByte(s, '/'); i >= 0 {
		s, rest = s[:i], s[i:]
	}
	major, minor, _ := strings.Cut(s, ".")
	ma, err1 := strconv.ParseUint(major, 10, 16)
	mi, err2 := strconv.ParseUint(minor, 10, 16)
	if err1 != nil || err2 != nil {
		return maxVersion, rest, fault.New(fault.Invalid, "invalid API version %q", s)
	}
	switch {
	case ma < 1 || ma == 1 && version(mi) < minVersion:
		return 0, rest, fault.New(fault.Invalid, "client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", s, minVersion)
	case ma > 1 || version(mi) > maxVersion:
		return maxVersion, rest, fault.New(fault.Invalid, "client version %s is too new. Maximum supported API version is %s", s, maxVersion)
	}
	return version(mi), rest, nil
}
