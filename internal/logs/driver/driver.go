// Package driver knows the log drivers: which there are, which options each
// takes (Docker's names, meanings and refusals), what of a container an option
// such as tag or labels puts into a record. It opens nothing.
//
// Vocabulary. A *local* driver is read from the file that the monitor writes. A
// *remote* driver's records are sent on from that file, which then is also the
// *cache* that logs are read from (Docker calls it dual logging).
//
// The engine imports it to check what it is asked for, package remote to send.
package driver

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// The drivers.
const (
	JSONFile = "json-file"
	K8sFile  = "k8s-file"
	Local    = "local"
	None     = "none"
	Journald = "journald"
	Syslog   = "syslog"
	Fluentd  = "fluentd"
)

// Names lists the drivers, sorted.
func Names() []string {
	return []string{Fluentd, Journald, JSONFile, K8sFile, Local, None, Syslog}
}

// Remote tells whether a driver's records are sent on.
func Remote(name string) bool { return name == Journald || name == Syslog || name == Fluentd }

// Defaults are those of the drivers json-file and k8s-file.
type Defaults struct {
	MaxSize  int64 // bytes of a file, negative never rotates
	MaxFiles int
}

// Settings are what a log configuration comes to.
type Settings struct {
	Driver string
	// Format of the file: json-file, k8s-file or none.
	Format string
	// MaxSize in bytes rotates the file, 0 never; MaxFiles are kept.
	MaxSize     int64
	MaxFiles    int
	NonBlocking bool
	BufferSize  int64 // 0 is the default
	// Unreadable: the cache is switched off for readers.
	Unreadable bool
}

// localDefaults are Docker's for the driver local and for caches.
var localDefaults = Defaults{MaxSize: 20 << 20, MaxFiles: 5}

var (
	attrKeys  = []string{"env", "env-regex", "labels", "labels-regex", "tag"}
	fileKeys  = append([]string{"max-size", "max-file", "compress"}, attrKeys...)
	cacheKeys = []string{"cache-disabled", "cache-max-size", "cache-max-file", "cache-compress"}
	modeKeys  = []string{"mode", "max-buffer-size"}
)

func keysOf(name string) ([]string, bool) {
	switch name {
	case JSONFile, Local, K8sFile:
		return fileKeys, true
	case None:
		return nil, true
	case Journald:
		return attrKeys, true
	case Syslog:
		return slices.Concat(attrKeys, syslogKeys), true
	case Fluentd:
		return slices.Concat(attrKeys, fluentdKeys), true
	}
	return nil, false
}

func invalid(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }

// dockers are drivers that Docker has and this engine has not.
var dockers = []string{"awslogs", "etwlogs", "gcplogs", "gelf", "splunk"}

// Parse checks a configuration as Docker does, in its order and words, and says
// what it comes to.
func Parse(name string, o map[string]string, d Defaults) (Settings, error) {
	s := Settings{Driver: name, Format: JSONFile}
	switch o["mode"] {
	case "", "blocking":
	case "non-blocking":
		s.NonBlocking = true
	default:
		return s, invalid("logger: logging mode not supported: %s", o["mode"])
	}
	if v, ok := o["max-buffer-size"]; ok {
		if !s.NonBlocking {
			return s, invalid("logger: max-buffer-size option is only supported with 'mode=non-blocking'")
		}
		n, err := units.RAMInBytes(v)
		if err != nil || n <= 0 {
			return s, invalid("error parsing option max-buffer-size: invalid size: '%s'", v)
		}
		s.BufferSize = n
	}
	keys, known := keysOf(name)
	if slices.Contains(dockers, name) {
		return s, invalid("failed to initialize logging driver: %s is not supported: use %s", name, strings.Join(Names(), ", "))
	}
	if !known {
		return s, invalid("logger: no log driver named '%s' is registered", name) // clients compare it
	}
	for _, k := range slices.Sorted(maps.Keys(o)) {
		if slices.Contains(keys, k) || slices.Contains(modeKeys, k) || Remote(name) && slices.Contains(cacheKeys, k) ||
			name == K8sFile && k == "path" {
			continue
		}
		if name == Local {
			return s, invalid("unknown log opt '%s' for log driver local", k)
		}
		return s, invalid("unknown log opt '%s' for %s log driver", k, name)
	}
	prefix := ""
	switch name {
	case None:
		s.Format = None
		return s, nil
	case K8sFile:
		s.Format = K8sFile
	case Local:
		d = localDefaults
	case Syslog:
		if _, err := ParseSyslog(o); err != nil {
			return s, err
		}
	case Fluentd:
		if _, err := ParseFluentd(o); err != nil {
			return s, err
		}
	}
	if Remote(name) {
		d, prefix = localDefaults, "cache-"
		off, err := boolOpt(o, "cache-disabled")
		if err != nil {
			return s, err
		}
		s.Unreadable = off
	}
	if err := checkAttrs(o); err != nil {
		return s, err
	}
	return s, s.rotation(o, prefix, d)
}

func (s *Settings) rotation(o map[string]string, prefix string, d Defaults) error {
	s.MaxSize, s.MaxFiles = max(d.MaxSize, 0), max(d.MaxFiles, 1)
	if v, ok := o[prefix+"max-size"]; ok && v != "-1" {
		n, err := units.RAMInBytes(v)
		if err != nil || n < 0 {
			return invalid("invalid value for %smax-size: %q", prefix, v)
		}
		s.MaxSize = n
	} else if ok {
		s.MaxSize = 0
	}
	if v, ok := o[prefix+"max-file"]; ok {
		n, err := strconv.Atoi(v)
		if err != nil {
			return invalid("invalid value for %smax-file: %q", prefix, v)
		}
		if n < 1 {
			return invalid("%smax-file cannot be less than 1", prefix)
		}
		if n > 1000 {
			return invalid("%smax-file cannot be more than 1000", prefix)
		}
		s.MaxFiles = n
	}
	if _, err := boolOpt(o, prefix+"compress"); err != nil {
		return err
	}
	if Remote(s.Driver) {
		// Bounded, and never cut in place: a sender has its place in the file.
		if s.MaxSize == 0 {
			s.MaxSize = localDefaults.MaxSize
		}
		s.MaxFiles = max(s.MaxFiles, 2)
	}
	return nil
}

func boolOpt(o map[string]string, key string) (bool, error) {
	v, ok := o[key]
	if !ok || v == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, invalid("invalid value for %s: %q: write true or false", key, v)
	}
	return b, nil
}
