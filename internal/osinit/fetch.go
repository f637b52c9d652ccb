package osinit

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	// stalled is how long a download may bring nothing before its connection is given up.
	stalled = time.Minute
	// fetchTries is how often a download that brings nothing is tried again, with ever longer waits.
	fetchTries = 6
)

// download asks for a release. A connection that breaks off is taken up again where it broke: what comes is
// compared with the manifest piece by piece, so that it does not matter who sent which.
func download(ctx context.Context, from string) (io.ReadCloser, error) {
	u, err := url.Parse(from)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fault.New(fault.Invalid, "cannot fetch the release: %.200q is no address of http or https", from)
	}
	d := newFetch(ctx, u)
	if err := d.open(); err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

// fetch is one download.
type fetch struct {
	client  *http.Client
	address *url.URL
	// request makes one that ends with who asked for the download, or when it is hung up.
	request func() (*http.Request, context.CancelFunc, error)
	done    <-chan struct{}
	stop    context.CancelFunc
	wait    time.Duration // after the first failure
	stall   time.Duration

	body    io.ReadCloser
	hangUp  func() // ends the present connection
	at      int64  // how much was read
	size    int64  // of the whole; -1 is unknown
	version string // what tells whether the file is still the same
	failed  int    // tries since something came
}

func newFetch(ctx context.Context, u *url.URL) *fetch {
	ctx, stop := context.WithCancel(ctx)
	return &fetch{client: fetcher(), address: u, done: ctx.Done(), stop: stop, wait: time.Second, stall: stalled, request: func() (*http.Request, context.CancelFunc, error) {
		ctx, cancel := context.WithCancel(ctx)
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		return r, cancel, err
	}}
}

// open asks for what is still to come.
func (d *fetch) open() error {
	req, cancel, err := d.request()
	if err != nil {
		cancel()
		return fault.New(fault.Invalid, "cannot fetch the release: %w", err)
	}
	if d.at > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", d.at))
		if d.version != "" {
			req.Header.Set("If-Range", d.version)
		}
	}
	res, err := d.client.Do(req)
	if err != nil {
		cancel()
		return fault.New(fault.Unavailable, "cannot fetch the release: %w", err)
	}
	fail := func(err error) error {
		res.Body.Close()
		cancel()
		return err
	}
	switch {
	case res.StatusCode == http.StatusPartialContent && d.at > 0:
		if want := fmt.Sprintf("bytes %d-", d.at); !strings.HasPrefix(res.Header.Get("Content-Range"), want) {
			return fail(fault.New(fault.Unavailable, "cannot fetch the release from %s: it answers with another range (%.100q)", d.address.Redacted(), res.Header.Get("Content-Range")))
		}
	case res.StatusCode != http.StatusOK:
		return fail(fault.New(fault.Unavailable, "cannot fetch the release from %s: %s", d.address.Redacted(), res.Status))
	default:
		if d.at == 0 {
			d.size, d.version = res.ContentLength, res.Header.Get("ETag")
			if strings.HasPrefix(d.version, "W/") || d.version == "" {
				d.version = res.Header.Get("Last-Modified")
			}
		}
	}
	d.body, d.hangUp = res.Body, cancel
	if res.StatusCode == http.StatusOK && d.at > 0 {
		// A server that knows no ranges, or has another file now, which the manifest will tell.
		if _, err := io.CopyN(io.Discard, &steady{d}, d.at); err != nil {
			return fail(fault.New(fault.Unavailable, "cannot fetch the release: %w", err))
		}
	}
	return nil
}

// steady reads the present connection, which is hung up when nothing comes for long.
type steady struct{ d *fetch }

func (s *steady) Read(b []byte) (int, error) {
	t := time.AfterFunc(s.d.stall, s.d.hangUp)
	defer t.Stop()
	return s.d.body.Read(b)
}

func (d *fetch) Read(b []byte) (int, error) {
	for {
		n, err := (&steady{d}).Read(b)
		d.at += int64(n)
		if n > 0 {
			d.failed = 0
			return n, nil // an error comes again
		}
		if err == nil {
			continue
		}
		if d.ended() || errors.Is(err, io.EOF) && (d.size < 0 || d.at >= d.size) {
			return 0, err
		}
		if err := d.again(err); err != nil {
			return 0, err
		}
	}
}

// again takes up a download that broke off.
func (d *fetch) again(why error) error {
	d.body.Close()
	d.hangUp()
	for {
		if d.failed++; d.failed > fetchTries {
			return fault.New(fault.Unavailable, "cannot fetch the release: it broke off after %d bytes: %w", d.at, why)
		}
		select {
		case <-d.done:
			return context.Canceled
		case <-time.After(d.wait << (d.failed - 1)):
		}
		err := d.open()
		if err == nil {
			return nil
		}
		why = err
	}
}

func (d *fetch) ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Close ends the download.
func (d *fetch) Close() error {
	d.stop()
	return d.body.Close()
}

// fetcher trusts the authorities that the machine does.
func fetcher() *http.Client {
	t := &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: time.Minute}
	if b, err := os.ReadFile(trusted()); err == nil {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(b)
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &http.Client{Transport: t}
}
