package driver

import (
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/docker/go-units"
)

var syslogKeys = []string{"syslog-address", "syslog-facility", "syslog-format", "syslog-tls-ca-cert", "syslog-tls-cert", "syslog-tls-key", "syslog-tls-skip-verify"}

// SyslogOptions say where and how to send.
type SyslogOptions struct {
	// Network is udp, tcp, tcp+tls, unix or unixgram; "" is the host's own
	// socket. Address is host:port or a path.
	Network, Address string
	Facility         int
	Format           string // "", rfc3164, rfc5424, rfc5424micro
	CA, Cert, Key    string // files, PEM
	SkipVerify       bool
}

var facilities = []string{"kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"}

// ParseSyslog reads the options of the driver syslog.
func ParseSyslog(o map[string]string) (SyslogOptions, error) {
	s := SyslogOptions{Format: o["syslog-format"], Facility: 3, CA: o["syslog-tls-ca-cert"], Cert: o["syslog-tls-cert"], Key: o["syslog-tls-key"]}
	// Docker skips verification if the option is there, whatever it says.
	_, s.SkipVerify = o["syslog-tls-skip-verify"]
	if v, ok := o["syslog-tls-skip-verify"]; ok {
		if b, err := strconv.ParseBool(v); err == nil {
			s.SkipVerify = b
		}
	}
	switch s.Format {
	case "", "rfc3164", "rfc5424", "rfc5424micro":
	default:
		return s, invalid("Invalid syslog format")
	}
	if v := o["syslog-facility"]; v != "" {
		if n, err := strconv.Atoi(v); err == nil && n >= 0 && n <= 23 {
			s.Facility = n
		} else if i := slices.Index(facilities, v); i >= 0 {
			s.Facility = i
		} else if len(v) == 6 && v[:5] == "local" && v[5] >= '0' && v[5] <= '7' {
			s.Facility = 16 + int(v[5]-'0')
		} else {
			return s, invalid("invalid syslog facility")
		}
	}
	addr := o["syslog-address"]
	if addr == "" {
		return s, nil
	}
	u, err := url.Parse(addr)
	if err != nil {
		return s, invalid("unable to parse syslog-address: %w", err)
	}
	switch s.Network = u.Scheme; u.Scheme {
	case "unix", "unixgram":
		if _, err := os.Stat(u.Path); err != nil {
			return s, invalid("unable to stat syslog-address: %w", err)
		}
		s.Address = u.Path
	case "udp", "tcp", "tcp+tls":
		if s.Address, err = hostPort(u.Host, "514"); err != nil {
			return s, invalid("invalid syslog-address %q: %w", addr, err)
		}
	default:
		return s, invalid("unable to parse syslog-address: invalid address: %q: write udp://, tcp://, tcp+tls://, unix:// or unixgram://", addr)
	}
	if (s.Cert == "") != (s.Key == "") {
		return s, invalid("syslog-tls-cert and syslog-tls-key must be given together")
	}
	return s, nil
}

func hostPort(host, port string) (string, error) {
	h, p, err := net.SplitHostPort(host)
	if err != nil {
		h, p, err = net.SplitHostPort(host + ":" + port)
	}
	if err != nil {
		return "", err
	}
	if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
		return "", invalid("invalid port %q", p)
	}
	return net.JoinHostPort(h, p), nil
}

var fluentdKeys = []string{"fluentd-address", "fluentd-async", "fluentd-async-connect", "fluentd-async-reconnect-interval", "fluentd-buffer-limit",
	"fluentd-max-retries", "fluentd-request-ack", "fluentd-retry-wait", "fluentd-sub-second-precision", "fluentd-read-timeout", "fluentd-write-timeout"}

// FluentdOptions say where and how to send.
type FluentdOptions struct {
	// Network is tcp, tls or unix.
	Network, Address          string
	Async, RequestAck         bool
	SubSecond                 bool
	RetryWait                 time.Duration
	MaxRetries                int
	ReadTimeout, WriteTimeout time.Duration // 0 is none
}

// ParseFluentd reads the options of the driver fluentd.
func ParseFluentd(o map[string]string) (FluentdOptions, error) {
	f := FluentdOptions{Network: "tcp", Address: "127.0.0.1:24224", RetryWait: time.Second, MaxRetries: 1<<31 - 1}
	if addr := o["fluentd-address"]; addr != "" {
		if err := f.address(addr); err != nil {
			return f, err
		}
	}
	_, oldAsync := o["fluentd-async-connect"]
	if _, ok := o["fluentd-async"]; ok && oldAsync {
		return f, invalid("conflicting options: cannot specify both 'fluentd-async' and 'fluentd-async-connect'")
	}
	var err error
	for k, to := range map[string]*bool{"fluentd-async": &f.Async, "fluentd-request-ack": &f.RequestAck, "fluentd-sub-second-precision": &f.SubSecond} {
		if *to, err = boolOpt(o, k); err != nil {
			return f, err
		}
	}
	if oldAsync {
		if f.Async, err = boolOpt(o, "fluentd-async-connect"); err != nil {
			return f, err
		}
	}
	for k, to := range map[string]*time.Duration{"fluentd-retry-wait": &f.RetryWait, "fluentd-read-timeout": &f.ReadTimeout,
		"fluentd-write-timeout": &f.WriteTimeout, "fluentd-async-reconnect-interval": new(time.Duration)} {
		v := o[k]
		if v == "" {
			continue
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return f, invalid("invalid value for %s: %q: must be a duration such as 500ms", k, v)
		}
		if k == "fluentd-async-reconnect-interval" && d != 0 && (d < 100*time.Millisecond || d > 10*time.Second) {
			return f, invalid("invalid fluentd-async-reconnect-interval: value (%q) must be between 100ms and 10s", v)
		}
		*to = d
	}
	if v := o["fluentd-max-retries"]; v != "" {
		n, err := strconv.ParseInt(v, 10, 32)
		if err != nil || n < 0 {
			return f, invalid("invalid value for fluentd-max-retries: %q", v)
		}
		f.MaxRetries = int(n)
	}
	if v := o["fluentd-buffer-limit"]; v != "" {
		if n, err := units.RAMInBytes(v); err != nil || n < 0 {
			return f, invalid("invalid value for fluentd-buffer-limit: %q", v)
		}
	}
	return f, nil
}

func (f *FluentdOptions) address(addr string) error {
	bad := func(err error) error { return invalid("invalid fluentd-address (%s): %w", addr, err) }
	u, err := url.Parse(addr)
	// A bare host:port is no URL, or one with a funny scheme.
	if _, _, serr := net.SplitHostPort(addr); err != nil && serr == nil || err == nil && u.Host == "" && u.Path == "" || err == nil && u.Scheme != "" && u.Host == "" && u.Scheme != "unix" {
		u, err = url.Parse("tcp://" + addr)
	} else if err == nil && u.Scheme == "" {
		u, err = url.Parse("tcp://" + addr)
	}
	if err != nil {
		return bad(err)
	}
	switch u.Scheme {
	case "unix":
		if len(u.Path) < 2 {
			return bad(invalid("path is empty"))
		}
		f.Network, f.Address = "unix", u.Path
		return nil
	case "tcp", "tls":
		if u.Path != "" {
			return bad(invalid("should not contain a path element"))
		}
		f.Network = u.Scheme
		if u.Host == "" || u.Hostname() == "" {
			u.Host = "127.0.0.1:" + orPort(u.Port())
		}
		if f.Address, err = hostPort(u.Host, "24224"); err != nil {
			return bad(err)
		}
		return nil
	}
	return bad(invalid("unsupported scheme: %s", u.Scheme))
}

func orPort(p string) string {
	if p == "" {
		return "24224"
	}
	return p
}
