package remote

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/logs/driver"
)

// authority signs certificates for 127.0.0.1, as files.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	var err error
	a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "logs"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &a.key.PublicKey, a.key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	a.file = a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	p := filepath.Join(a.dir, name)
	must(a.t, os.WriteFile(p, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return p
}

func (a *authority) issue(name string) (cert, key string) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	tpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, a.cert, &k.PublicKey, a.key)
	must(a.t, err)
	kd, err := x509.MarshalECPrivateKey(k)
	must(a.t, err)
	return a.write(name+".pem", "CERTIFICATE", der), a.write(name+".key", "EC PRIVATE KEY", kd)
}

// over makes a receiver's connections TLS, with clients that the authority knows.
func (a *authority) over(auth tls.ClientAuthType, each func(net.Conn, func(string))) func(net.Conn, func(string)) {
	cert, key := a.issue("receiver")
	pair, err := tls.LoadX509KeyPair(cert, key)
	must(a.t, err)
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return func(c net.Conn, got func(string)) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: auth, ClientCAs: pool, MinVersion: tls.VersionTLS12})
		if s.Handshake() != nil {
			c.Close()
			return
		}
		each(s, got)
	}
}

// readFrames reads messages that are counted (RFC 5425).
func readFrames(c net.Conn, got func(string)) {
	in := bufio.NewReader(c)
	for {
		head, err := in.ReadString(' ')
		if err != nil {
			return
		}
		n, err := strconv.Atoi(strings.TrimSpace(head))
		if err != nil || n > 64<<10 {
			got("no frame: " + head)
			return
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(in, b); err != nil {
			return
		}
		got(strings.TrimSuffix(string(b), "\n"))
	}
}

func TestSyslogOverTLS(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	in := &receiver{t: t, addr: "127.0.0.1:0", each: ca.over(tls.RequireAndVerifyClientCert, readFrames)}
	in.open()
	cert, key := ca.issue("engine")
	options := func(authority, cert, key string) map[string]string {
		o := map[string]string{"syslog-address": "tcp+tls://" + in.addr, "syslog-format": "rfc5424", "syslog-tls-ca-cert": authority}
		if cert != "" {
			o["syslog-tls-cert"], o["syslog-tls-key"] = cert, key
		}
		return o
	}
	t.Run("both prove themselves", func(t *testing.T) {
		r := newRig(t)
		s := r.start()
		must(t, s.Prepare(source(t, driver.Syslog, options(ca.file, cert, key))))
		r.say(0, 30)
		s.Started(cid)
		eventually(t, "all arrive", func() bool { return len(in.all()) == 30 })
		if got := in.all(); !slices.Equal(messages(got), lines(0, 30)) || !strings.HasPrefix(got[0], "<") {
			t.Errorf("got %q", got)
		}
	})
	strangerCert, strangerKey := other.issue("stranger")
	for name, o := range map[string]map[string]string{
		"the receiver is another": options(other.file, cert, key), "no certificate of ours": options(ca.file, "", ""), "one of a stranger": options(ca.file, strangerCert, strangerKey),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			s := r.start()
			must(t, s.Prepare(source(t, driver.Syslog, o)))
			r.say(0, 5)
			s.Started(cid)
			eventually(t, "the trouble is told", func() bool { return strings.Contains(r.out.String(), "level=WARN") })
			if n := len(in.all()); n != 30 {
				t.Errorf("%d messages", n)
			}
			if len(s.Status().Backlog) == 0 {
				t.Error("what was not sent is not waiting")
			}
		})
	}
}

// system is the authority that the process trusts: it reads its roots once.
var system *authority

func TestFluentdOverTLS(t *testing.T) {
	if system == nil {
		system = newAuthority(t)
	}
	ca := *system
	ca.t, ca.dir = t, t.TempDir()
	// The forward protocol's options name no authority: the system's count.
	t.Setenv("SSL_CERT_FILE", ca.file)
	in := &receiver{t: t, addr: "127.0.0.1:0", each: ca.over(tls.NoClientCert, fluent(true))}
	in.open()
	r := newRig(t)
	s := r.start()
	must(t, s.Prepare(source(t, driver.Fluentd, map[string]string{"fluentd-address": "tls://" + in.addr, "fluentd-request-ack": "true"})))
	r.say(0, 25)
	s.Started(cid)
	eventually(t, "all arrive", func() bool { return len(in.all()) == 25 })
	if got := in.all(); !slices.Equal(fluentLines(got), lines(0, 25)) {
		t.Errorf("got %q", got)
	}
}
