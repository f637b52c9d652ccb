package remote

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/cloudos-io/cloudos/internal/logs/driver"
)

// syslogSink speaks RFC 5424, RFC 3164 or what local daemons expect.
type syslogSink struct {
	o    driver.SyslogOptions
	host string
	pid  string
	tag  string
	dial *net.Dialer

	packet net.Conn // udp, unixgram
	stream *stream
}

func newSyslog(s Source, host string) (*syslogSink, error) {
	o, err := driver.ParseSyslog(s.Options)
	if err != nil {
		return nil, err
	}
	return &syslogSink{o: o, host: host, pid: strconv.Itoa(os.Getpid()), tag: s.Tag, dial: &net.Dialer{Timeout: 10 * time.Second}}, nil
}

// localSyslog are where a host's own daemon listens.
var localSyslog = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

func (s *syslogSink) connect(ctx context.Context) error {
	if s.packet != nil || s.stream != nil {
		return nil
	}
	var c net.Conn
	var err error
	switch s.o.Network {
	case "udp", "unixgram":
		s.packet, err = s.dial.DialContext(ctx, s.o.Network, s.o.Address)
		return err
	case "tcp", "unix":
		c, err = s.dial.DialContext(ctx, s.o.Network, s.o.Address)
		if err != nil {
			return err
		}
		s.stream, err = newStream(c, c, true)
	case "tcp+tls":
		conf, cerr := s.tlsConfig()
		if cerr != nil {
			return cerr
		}
		below, derr := s.dial.DialContext(ctx, "tcp", s.o.Address)
		if derr != nil {
			return derr
		}
		t, terr := secure(ctx, below, conf, s.dial.Timeout)
		if terr != nil {
			return terr
		}
		c = t
		s.stream, err = newStream(t, below, true)
	default:
		var errs []error
		for _, p := range localSyslog {
			if s.packet, err = s.dial.DialContext(ctx, "unixgram", p); err == nil {
				return nil
			}
			if c, err = s.dial.DialContext(ctx, "unix", p); err == nil {
				s.stream, err = newStream(c, c, true)
				break
			}
			s.packet, c = nil, nil
			errs = append(errs, err)
		}
		if c == nil {
			return fmt.Errorf("cannot find the host's syslog socket: %w", errors.Join(errs...))
		}
	}
	if err != nil && c != nil {
		c.Close()
		s.stream = nil
	}
	return err
}

func (s *syslogSink) tlsConfig() (*tls.Config, error) {
	host, _, _ := net.SplitHostPort(s.o.Address)
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, InsecureSkipVerify: s.o.SkipVerify} //nolint:gosec // asked for by option
	if s.o.CA != "" {
		pem, err := os.ReadFile(s.o.CA)
		if err != nil {
			return nil, fmt.Errorf("cannot read syslog-tls-ca-cert: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("cannot use syslog-tls-ca-cert %s: it holds no certificate", s.o.CA)
		}
	}
	if s.o.Cert != "" {
		pair, err := tls.LoadX509KeyPair(s.o.Cert, s.o.Key)
		if err != nil {
			return nil, fmt.Errorf("cannot use syslog-tls-cert: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// format appends one message.
func (s *syslogSink) format(b []byte, e Entry) []byte {
	severity := 6 // informational
	if e.Stderr {
		severity = 3 // error
	}
	b = append(b, '<')
	b = strconv.AppendInt(b, int64(s.o.Facility*8+severity), 10)
	b = append(b, '>')
	micro := false
	switch s.o.Format {
	case "rfc5424micro":
		micro = true
		fallthrough
	case "rfc5424":
		stamp := time.RFC3339
		if micro {
			stamp = "2006-01-02T15:04:05.000000Z07:00"
		}
		b = append(b, "1 "...)
		b = e.Time.Local().AppendFormat(b, stamp)
		b = append(b, ' ')
		b = append(b, s.host...)
		b = append(b, ' ')
		b = append(b, s.tag...)
		b = append(b, ' ')
		b = append(b, s.pid...)
		b = append(b, ' ')
		b = append(b, s.tag...)
		b = append(b, " - "...)
	case "rfc3164":
		b = e.Time.Local().AppendFormat(b, time.Stamp)
		b = append(b, ' ')
		b = append(b, s.host...)
		b = append(b, ' ')
		b = s.tagged(b)
	default:
		b = e.Time.Local().AppendFormat(b, time.Stamp)
		b = append(b, ' ')
		b = s.tagged(b)
	}
	b = append(b, e.Line...)
	return append(b, '\n')
}

func (s *syslogSink) tagged(b []byte) []byte {
	b = append(b, s.tag...)
	b = append(b, '[')
	b = append(b, s.pid...)
	return append(b, "]: "...)
}

func (s *syslogSink) send(ctx context.Context, batch []Entry) (int, error) {
	if err := s.connect(ctx); err != nil {
		return 0, err
	}
	if s.packet != nil {
		var buf []byte
		for i, e := range batch {
			buf = s.format(buf[:0], e)
			_ = s.packet.SetWriteDeadline(time.Now().Add(writeTimeout))
			if _, err := s.packet.Write(buf); err != nil {
				s.close()
				return i, err
			}
		}
		return len(batch), nil
	}
	framed := s.o.Network == "tcp+tls" && (s.o.Format == "rfc5424" || s.o.Format == "rfc5424micro") // RFC 5425, 4.3
	var out, one []byte
	for _, e := range batch {
		if !framed {
			out = s.format(out, e)
			continue
		}
		one = s.format(one[:0], e)
		out = strconv.AppendInt(out, int64(len(one)), 10)
		out = append(append(out, ' '), one...)
	}
	if err := s.stream.put(ctx, out); err != nil {
		s.close()
		return 0, err
	}
	return len(batch), nil
}

func (s *syslogSink) close() {
	if s.packet != nil {
		s.packet.Close()
		s.packet = nil
	}
	if s.stream != nil {
		s.stream.Close()
		s.stream = nil
	}
}
