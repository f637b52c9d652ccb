// Package notation reads the small languages of a container's options: ports,
// volumes, mounts, devices, limits, env files. They are Docker's, so that what
// people have in their fingers and scripts works. It is pure but for the env and
// label files it is told to read; the command line imports it.
package notation

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
)

// Bytes reads a size such as 512, 64k, 1.5g, 2GiB; factors are powers of 1024.
func Bytes(s string) (int64, error) {
	n, err := units.RAMInBytes(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size: write 512m, 1.5g", s)
	}
	return n, nil
}

// BytesOrUnlimited is Bytes, with -1 for no limit.
func BytesOrUnlimited(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	return Bytes(s)
}

// CPUs reads a number of processors such as 1.5 and gives billionths.
func CPUs(s string) (int64, error) {
	whole, frac, _ := strings.Cut(s, ".")
	if whole == "" {
		whole = "0"
	}
	w, err := strconv.ParseUint(whole, 10, 32)
	var f uint64
	if err == nil && frac != "" {
		if len(frac) > 9 {
			return 0, fmt.Errorf("%q is too precise: nine decimals at most", s)
		}
		f, err = strconv.ParseUint(frac+strings.Repeat("0", 9-len(frac)), 10, 32)
	}
	if err != nil || s == "" {
		return 0, fmt.Errorf("%q is not a number of processors: write 0.5, 2", s)
	}
	return int64(w*1e9 + f), nil
}

// KeyValue splits "key=value"; a missing value is "".
func KeyValue(s string) (k, v string, err error) {
	k, v, _ = strings.Cut(s, "=")
	if k == "" {
		return "", "", fmt.Errorf("%q has no key: write key=value", s)
	}
	return k, v, nil
}

// Map reads a list of "key=value".
func Map(list []string) (map[string]string, error) {
	m := make(map[string]string, len(list))
	for _, s := range list {
		k, v, err := KeyValue(s)
		if err != nil {
			return nil, err
		}
		m[k] = v
	}
	return m, nil
}

// Env makes the list of environment variables of files and flags; flags win by
// coming last. A name without value takes lookup's; when it has none either, the
// name alone asks the engine to drop the image's variable.
func Env(flags, files []string, lookup func(string) (string, bool)) ([]string, error) {
	var out []string
	for _, f := range files {
		lines, err := keyFile(f)
		if err != nil {
			return nil, err
		}
		for _, l := range lines {
			if strings.Contains(l, "=") {
				out = append(out, l)
			} else if v, ok := lookup(l); ok {
				out = append(out, l+"="+v)
			}
		}
	}
	for _, e := range flags {
		name, _, has := strings.Cut(e, "=")
		if name == "" {
			return nil, fmt.Errorf("environment variable %q has no name", e)
		}
		if !has {
			if v, ok := lookup(e); ok {
				e += "=" + v
			}
		}
		out = append(out, e)
	}
	return out, nil
}

// Labels makes the labels of files and flags.
func Labels(flags, files []string) (map[string]string, error) {
	var list []string
	for _, f := range files {
		lines, err := keyFile(f)
		if err != nil {
			return nil, err
		}
		list = append(list, lines...)
	}
	return Map(append(list, flags...))
}

// maxKeyFile bounds an env or label file.
const maxKeyFile = 16 << 20

// keyFile reads lines of key[=value]; '#' begins a comment line, blanks before
// the key are dropped.
func keyFile(name string) ([]string, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, maxKeyFile)
	for n := 1; sc.Scan(); n++ {
		b := sc.Bytes()
		if n == 1 {
			b = bytes.TrimPrefix(b, []byte("\uFEFF"))
		}
		if !utf8.Valid(b) {
			return nil, fmt.Errorf("%s, line %d: not UTF-8", name, n)
		}
		line := strings.TrimLeftFunc(string(b), unicode.IsSpace)
		if line == "" || line[0] == '#' {
			continue
		}
		key, _, _ := strings.Cut(line, "=")
		if key == "" {
			return nil, fmt.Errorf("%s, line %d: no name before '='", name, n)
		}
		if strings.ContainsFunc(key, unicode.IsSpace) {
			return nil, fmt.Errorf("%s, line %d: the name %q has blanks in it", name, n, key)
		}
		out = append(out, line)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", name, err)
	}
	return out, nil
}

// Restart reads a restart policy: no, always, unless-stopped, on-failure[:max].
func Restart(s string) (container.RestartPolicy, error) {
	name, max, has := strings.Cut(s, ":")
	p := container.RestartPolicy{Name: container.RestartPolicyMode(name)}
	if has {
		n, err := strconv.Atoi(max)
		if err != nil {
			return p, fmt.Errorf("%q: the number of attempts is not a number", s)
		}
		p.MaximumRetryCount = n
	}
	if name == "" && s != "" {
		return p, fmt.Errorf("%q has no policy before the colon", s)
	}
	return p, container.ValidateRestartPolicy(p)
}

// Ulimit reads name=soft[:hard].
func Ulimit(s string) (*container.Ulimit, error) {
	u, err := units.ParseUlimit(s)
	if err != nil {
		return nil, fmt.Errorf("%q is not a ulimit (write nofile=1024:2048): %w", s, err)
	}
	return u, nil
}

// Host reads host:ip or host=ip for --add-host and gives "host:ip". The ip may
// be host-gateway.
func Host(s string) (string, error) {
	name, ip, ok := strings.Cut(s, "=")
	if !ok || strings.Contains(name, ":") {
		name, ip, ok = strings.Cut(s, ":")
	}
	if !ok || name == "" {
		return "", fmt.Errorf("%q is not host:ip", s)
	}
	ip = strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
	if ip != "host-gateway" {
		if _, err := netip.ParseAddr(ip); err != nil {
			return "", fmt.Errorf("%q: %q is neither an address nor host-gateway", s, ip)
		}
	}
	return name + ":" + ip, nil
}

// WeightDevice reads path:weight.
func WeightDevice(s string) (*blkiodev.WeightDevice, error) {
	path, w, ok := cutLast(s)
	if !ok || !strings.HasPrefix(path, "/dev/") {
		return nil, fmt.Errorf("%q is not /dev/NAME:weight", s)
	}
	n, err := strconv.ParseUint(w, 10, 16)
	if err != nil || n > 0 && (n < 10 || n > 1000) {
		return nil, fmt.Errorf("%q: a weight is 10 to 1000", s)
	}
	return &blkiodev.WeightDevice{Path: path, Weight: uint16(n)}, nil
}

// ThrottleBytes reads path:bytes-per-second, with a unit or without.
func ThrottleBytes(s string) (*blkiodev.ThrottleDevice, error) {
	path, r, ok := cutLast(s)
	if !ok || !strings.HasPrefix(path, "/dev/") {
		return nil, fmt.Errorf("%q is not /dev/NAME:rate", s)
	}
	n, err := Bytes(r)
	if err != nil || n < 0 {
		return nil, fmt.Errorf("%q: %q is not a rate: write 1mb", s, r)
	}
	return &blkiodev.ThrottleDevice{Path: path, Rate: uint64(n)}, nil
}

// ThrottleOps reads path:operations-per-second.
func ThrottleOps(s string) (*blkiodev.ThrottleDevice, error) {
	path, r, ok := cutLast(s)
	if !ok || !strings.HasPrefix(path, "/dev/") {
		return nil, fmt.Errorf("%q is not /dev/NAME:rate", s)
	}
	n, err := strconv.ParseUint(r, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%q: %q is not a number of operations", s, r)
	}
	return &blkiodev.ThrottleDevice{Path: path, Rate: n}, nil
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// DetachKeys checks a sequence such as ctrl-p,ctrl-q and gives its bytes.
func DetachKeys(s string) ([]byte, error) {
	var out []byte
	for _, k := range strings.Split(s, ",") {
		if len(k) == 1 {
			out = append(out, k[0])
			continue
		}
		c, ok := strings.CutPrefix(k, "ctrl-")
		if !ok || len(c) != 1 {
			return nil, fmt.Errorf("%q is not a key: write a letter or ctrl-LETTER, separated by commas", k)
		}
		switch b := c[0]; {
		case b >= 'a' && b <= 'z':
			out = append(out, b-'a'+1)
		case b == '@':
			out = append(out, 0)
		case b >= '[' && b <= '_':
			out = append(out, b-'['+27)
		default:
			return nil, fmt.Errorf("%q is not a key: ctrl- goes with a-z, @ and [ \\ ] ^ _", k)
		}
	}
	return out, nil
}

// Time reads a point in time as people write it: RFC 3339 with parts left out, a
// Unix time, or a duration before now.
func Time(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	sec, frac, _ := strings.Cut(s, ".")
	if n, err := strconv.ParseInt(sec, 10, 64); err == nil {
		var ns int64
		if frac != "" {
			if len(frac) > 9 {
				frac = frac[:9]
			}
			ns, err = strconv.ParseInt(frac+strings.Repeat("0", 9-len(frac)), 10, 64)
			if err != nil {
				return time.Time{}, fmt.Errorf("%q is not a time", s)
			}
		}
		return time.Unix(n, ns), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04Z07:00"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	for _, layout := range []string{"2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02Z07:00", "2006-01-02", "2006-01-02 15:04:05"} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time: write 2006-01-02T15:04:05, a Unix time, or 10m for ten minutes ago", s)
}
