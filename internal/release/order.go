package release

import (
	"strconv"
	"strings"

	"golang.org/x/mod/semver"

	"github.com/cloudos-io/cloudos/internal/pattern"
)

// behind is what `git describe` adds to a release's tag.
var behind = pattern.New(`^(.*)-(\d{1,9})-g[0-9a-f]{4,40}$`)

// Older reports whether version a is before b. known is false where that cannot be told:
// versions are semantic (1.2.3, v1.2.3-rc.1), with what `git describe` adds.
func Older(a, b string) (older, known bool) {
	if a == b {
		return false, true
	}
	av, an, aok := order(a)
	bv, bn, bok := order(b)
	if !aok || !bok {
		return false, false
	}
	if c := semver.Compare(av, bv); c != 0 {
		return c < 0, true
	}
	return an < bn, true
}

// order splits a version into a semantic one and the number of changes behind it.
func order(s string) (v string, n int, ok bool) {
	s = strings.TrimSuffix(s, "-dirty")
	if m := behind.FindStringSubmatch(s); m != nil {
		s = m[1]
		n, _ = strconv.Atoi(m[2])
	}
	v = "v" + strings.TrimPrefix(s, "v")
	return v, n, semver.IsValid(v) && strings.Count(v, ".") >= 2 // the short hash of a commit may have digits alone
}
