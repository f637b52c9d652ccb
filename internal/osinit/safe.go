package osinit

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/guest"
)

// A machine whose configuration is wrong runs no engine, and so nothing that listens on the network. Where it was
// reached over the network before, it is reached in safe mode, too: under the name, on the links and with the certificates of
// the last configuration that an engine came up with, which is kept on the data disk (ADR 59). Only what is
// about the system is served, and to nobody without a certificate by the authority of then.

// goodFile is the last document with which an engine came up that is reached over the network.
const goodFile = "/var/lib/cloudos/good.yaml"

// rescue is what a machine in safe mode is reached with.
type rescue struct {
	document []byte           // whole
	applied  *config.Document // what of it is used: name, network and clock
	listen   []string
	tls      *tls.Config
	judged   bool
}

// newRescue reads a document; nil is one that lets nobody in over the network. read reads the files that it names.
func newRescue(document []byte, read func(string) ([]byte, error)) (*rescue, error) {
	if len(document) == 0 {
		return nil, nil
	}
	doc, access, err := config.LastGood(document)
	if err != nil || len(access.Listen) == 0 {
		return nil, err
	}
	cert, key, ca := []byte(doc.TLS.Cert), []byte(doc.TLS.Key), []byte(doc.TLS.CA)
	if doc.TLS == (config.TLS{}) {
		f := access.Files
		if f.Cert == "" && f.Key == "" && f.CA == "" {
			return nil, nil // loopback addresses, of which anybody is believed who reaches them
		}
		var certErr, keyErr, caErr error
		cert, certErr = read(f.Cert)
		key, keyErr = read(f.Key)
		ca, caErr = read(f.CA)
		if err := errors.Join(certErr, keyErr, caErr); err != nil {
			return nil, fmt.Errorf("cannot read what the API is served with: %w", err)
		}
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("cannot use what the API is served with: %w", err)
	}
	clients := x509.NewCertPool() // never nil, which would be every authority of the web
	if !clients.AppendCertsFromPEM(ca) {
		return nil, errors.New("cannot use what the API is served with: there is no authority for clients")
	}
	return &rescue{
		document: document, listen: access.Listen, judged: access.Judged,
		applied: &config.Document{Version: doc.Version, Hostname: doc.Hostname, Network: doc.Network, Time: doc.Time},
		tls: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert,
			ClientCAs: clients, NextProtos: []string{"http/1.1"}},
	}, nil
}

// smallFile reads a file that a document names.
func smallFile(p string) ([]byte, error) {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > config.MaxSize {
		return nil, errors.Join(err, fmt.Errorf("%s is no small file", p))
	}
	return io.ReadAll(io.LimitReader(f, config.MaxSize))
}

// help is how a machine in safe mode is reached: as the document says that it found, where that is good, else as the
// last good one says. nil is not at all.
func (m *machine) help(wrong bool) *rescue {
	m.mu.Lock()
	document, kind := m.document, m.dataKind
	m.mu.Unlock()
	var err error
	if wrong {
		if kind != "disk" {
			return nil
		}
		if document, err = smallFile(goodFile); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	var r *rescue
	if err == nil {
		r, err = newRescue(document, smallFile)
	}
	if err != nil {
		m.problem(err)
		return nil
	}
	if r != nil && wrong {
		m.mu.Lock()
		// What is shown, and whose secrets fill what comes back.
		m.document, m.host = document, r.applied.Hostname
		m.configSource = "last good (not the one from " + m.configSource + ")"
		m.mu.Unlock()
	}
	return r
}

// keepGood keeps the document in use for safe mode, once an engine came up with it; where it lets nobody in
// over the network, nobody is let in by an earlier one either.
func (m *machine) keepGood(ctx context.Context) {
	select {
	case <-m.ready:
	case <-ctx.Done():
		return
	}
	m.mu.Lock()
	document, kind := m.document, m.dataKind
	m.mu.Unlock()
	if kind != "disk" {
		return
	}
	written, err := keepGood(goodFile, document, smallFile)
	if err != nil {
		m.problem(fmt.Errorf("cannot keep the configuration for safe mode: %w", err))
	}
	if written {
		m.log.Printf("this configuration is kept for safe mode, too")
	}
}

func keepGood(file string, document []byte, read func(string) ([]byte, error)) (written bool, err error) {
	r, err := newRescue(document, read)
	if err != nil {
		return false, err
	}
	if r == nil {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
		return false, nil
	}
	// Without what an installation is for, and without a passphrase of the disk that it is kept on.
	good, err := config.Installed(document)
	if err != nil {
		return false, err
	}
	if had, err := os.ReadFile(file); err == nil && bytes.Equal(had, good) {
		return false, nil
	}
	return true, durable.WriteFile(file, good, 0o600, durable.Everything)
}

// maxSafeConnections bounds those that are open at once: they cost memory before a client has shown who it is.
const maxSafeConnections = 64

// serveSafe serves the system's API over the network until ctx is done.
func (m *machine) serveSafe(ctx context.Context, r *rescue, api http.Handler) {
	s := &http.Server{Handler: m.safeAPI(r, api), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }, ErrorLog: stdlog.New(io.Discard, "", 0)}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	done := make(chan struct{}, len(r.listen))
	for _, address := range r.listen {
		go func() {
			defer func() { done <- struct{}{} }()
			for said := ""; ctx.Err() == nil; {
				l, err := net.Listen("tcp", address)
				if err == nil {
					m.log.Printf("safe mode: the system's API is served on %s, to clients with a certificate", address)
					err = s.Serve(tls.NewListener(netutil.LimitListener(l, maxSafeConnections), r.tls))
				}
				// An address of a link that comes later is one later.
				if err != nil && ctx.Err() == nil && err.Error() != said {
					said = err.Error()
					m.log.Printf("safe mode: cannot serve the system's API on %s: %v", address, err)
				}
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		}()
	}
	for range r.listen {
		<-done
	}
}

// safeAPI serves what is about the system to whom TLS let in.
func (m *machine) safeAPI(r *rescue, api http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.TLS == nil || len(req.TLS.VerifiedChains) == 0 || req.Header.Get("Origin") != "" {
			guest.Fail(w, fault.New(fault.Forbidden, "this is served to programs with a certificate alone"))
			return
		}
		look := req.Method == http.MethodGet && req.URL.Path == "/servin/os/status"
		switch {
		case !strings.HasPrefix(req.URL.Path, "/servin/os/"), path.Clean(req.URL.Path) != req.URL.Path:
			m.mu.Lock()
			problems := slices.Clone(m.problems)
			m.mu.Unlock()
			guest.Fail(w, fault.New(fault.Unavailable, "the machine is in safe mode and runs no engine: %s", strings.Join(problems, "; ")))
			return
		case r.judged && !look:
			guest.Fail(w, fault.New(fault.Forbidden, "the machine is in safe mode: nothing judges there who may do that, as its last good configuration demands (policy, audit.required); mend it where its configuration is from"))
			return
		case !look:
			m.log.Printf("safe mode: %s %s by %q", req.Method, req.URL.Path, req.TLS.VerifiedChains[0][0].Subject.String())
		}
		api.ServeHTTP(w, req)
	})
}
