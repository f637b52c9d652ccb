// Package signal reads the names of signals as container clients write them. What
// takes a signal from outside imports it.
package signal

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// The bounds of real-time signals, as glibc and shells have them.
const (
	first = 1
	rtMin = 34
	rtMax = 64
)

// Parse reads a signal's name, with or without SIG, or number. Real-time signals
// are RTMIN+n and RTMAX-n.
func Parse(s string) (int, error) {
	bad := fault.New(fault.Invalid, "invalid signal: %s", s)
	if n, err := strconv.Atoi(s); err == nil {
		if n < first || n > rtMax {
			return 0, bad
		}
		return n, nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	for _, rt := range []struct {
		prefix     string
		base, sign int
	}{{"RTMIN", rtMin, 1}, {"RTMAX", rtMax, -1}} {
		rest, ok := strings.CutPrefix(name, rt.prefix)
		if !ok {
			continue
		}
		if rest == "" {
			return rt.base, nil
		}
		if n, err := strconv.Atoi(rest); err == nil && n*rt.sign > 0 && n*rt.sign <= rtMax-rtMin {
			return rt.base + n, nil
		}
		return 0, bad
	}
	if n := unix.SignalNum("SIG" + name); n != 0 {
		return int(n), nil
	}
	return 0, bad
}
