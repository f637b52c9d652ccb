// Package source finds the machine's configuration: on the kernel's command line, on
// the data disk (where the API puts it), on a NoCloud volume, with the cloud that
// the machine is in, or in the image itself. The first that has one is taken; nothing is merged. What is
// found and cannot be read is an error, not a reason to look on.
package source

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Found is a document and where it is from.
type Found struct {
	// Source is cmdline, disk, nocloud, aws, gcp, azure, digitalocean or image.
	Source   string
	Document []byte
	// Outside says that nothing measured or signed the document: who has the machine in hand, or
	// the network that it is on, can give another.
	Outside bool
	// Hostname is what the cloud calls the machine; it stands behind the document's.
	Hostname string
}

// maxDocument bounds what is read, in bytes.
const maxDocument = 1 << 20

// Places are where documents are looked for.
type Places struct {
	// CommandLine is the value of cloudos.config=.
	CommandLine string
	// Disk is the file on the data disk.
	Disk string
	// Volumes returns the files of a NoCloud volume, or nothing.
	Volumes func() (userData, metaData []byte, err error)
	// Vendor and Product are the firmware's names of the machine's maker, Asset is its chassis' tag.
	Vendor, Product, Asset string
	// Image is the file that the image carries.
	Image string
	// Online is closed when there is a network.
	Online <-chan struct{}
	// Endpoint stands for the clouds' address in tests: http://host.
	Endpoint string
	Log      func(format string, args ...any)
}

// Find looks in all places, in the order of the package's doc. Without a document
// Found is empty but for a Hostname.
func (p *Places) Find(ctx context.Context) (Found, error) {
	if p.CommandLine != "" {
		b, err := p.commandLine(ctx)
		if err != nil {
			return Found{Source: "cmdline"}, fmt.Errorf("cannot read the configuration that the command line names: %w", err)
		}
		// The command line is measured; what an address answers with is as good as who it is shown to be.
		return Found{Source: "cmdline", Document: b, Outside: strings.HasPrefix(p.CommandLine, "http:")}, nil
	}
	if p.Disk != "" {
		b, err := os.ReadFile(p.Disk)
		if err == nil {
			return Found{Source: "disk", Document: b}, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return Found{Source: "disk"}, fmt.Errorf("cannot read the configuration on the data disk: %w", err)
		}
	}
	var hostname string
	if p.Volumes != nil {
		user, meta, err := p.Volumes()
		if err != nil {
			return Found{Source: "nocloud"}, fmt.Errorf("cannot read the configuration on the volume cidata: %w", err)
		}
		hostname = metaHostname(meta)
		if doc, ok := document(user); ok {
			return Found{Source: "nocloud", Document: doc, Outside: true, Hostname: hostname}, nil
		}
		if len(user) > 0 {
			p.Log("what the volume cidata has as user data is no document of this system: it is left alone")
		}
	}
	cloud := p.cloud()
	if cloud == nil {
		return p.image(Found{Hostname: hostname})
	}
	select {
	case <-p.Online:
	case <-time.After(time.Minute):
		return Found{Source: cloud.name}, fmt.Errorf("cannot ask %s for the configuration: there is no network", cloud.name)
	case <-ctx.Done():
		return Found{}, ctx.Err()
	}
	f, err := p.ask(ctx, cloud)
	if err != nil {
		return Found{Source: cloud.name}, fmt.Errorf("cannot ask %s for the configuration: %w", cloud.name, err)
	}
	if len(f.Document) == 0 {
		return p.image(f)
	}
	return f, nil
}

// image takes what the image carries, as nobody else has a document.
func (p *Places) image(f Found) (Found, error) {
	if p.Image == "" {
		return f, nil
	}
	b, err := os.ReadFile(p.Image)
	if errors.Is(err, os.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return Found{Source: "image", Hostname: f.Hostname}, fmt.Errorf("cannot read the configuration in the image: %w", err)
	}
	return Found{Source: "image", Document: b, Hostname: f.Hostname}, nil
}

// Remote reports whether Find may need the network.
func (p *Places) Remote() bool {
	return p.CommandLine != "" && !strings.HasPrefix(p.CommandLine, "base64:") || p.CommandLine == "" && p.cloud() != nil
}

// document tells a document of ours from other user data: it says its version,
// or begins with "#cloudos".
func document(b []byte) ([]byte, bool) {
	s := strings.TrimSpace(string(b))
	if s == "" {
		return nil, false
	}
	if strings.HasPrefix(s, "#cloudos") {
		return b, true
	}
	if strings.HasPrefix(s, "#cloud-config") || strings.HasPrefix(s, "#!") {
		return nil, false
	}
	for _, line := range strings.Split(s, "\n") {
		if strings.HasPrefix(strings.TrimSpace(strings.Trim(line, "{")), "version:") || strings.Contains(line, `"version"`) {
			return b, true
		}
	}
	return nil, false
}

// metaHostname reads local-hostname out of NoCloud's meta data.
func metaHostname(b []byte) string {
	for _, line := range strings.Split(string(b), "\n") {
		k, v, ok := strings.Cut(line, ":")
		if k = strings.TrimSpace(k); ok && (k == "local-hostname" || k == "hostname") {
			return strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return ""
}

// commandLine reads base64:… itself, or an address.
func (p *Places) commandLine(ctx context.Context) ([]byte, error) {
	if enc, ok := strings.CutPrefix(p.CommandLine, "base64:"); ok {
		b, err := base64.StdEncoding.DecodeString(enc)
		if err != nil {
			b, err = base64.RawURLEncoding.DecodeString(strings.TrimRight(enc, "="))
		}
		if err != nil {
			return nil, fault.New(fault.Invalid, "it is not base64: %w", err)
		}
		return b, nil
	}
	u, err := url.Parse(p.CommandLine)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fault.New(fault.Invalid, "it is base64:TEXT, or an address of http or https")
	}
	select {
	case <-p.Online:
	case <-time.After(time.Minute):
		return nil, errors.New("there is no network")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return p.get(ctx, http.MethodGet, u.String(), nil)
}

var client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
	// Metadata is beside the machine: a proxy or another host's redirection has no part in it.
	Proxy: nil, DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext, DisableKeepAlives: true,
}, CheckRedirect: func(r *http.Request, via []*http.Request) error {
	if len(via) > 3 || r.URL.Host != via[0].URL.Host || r.URL.Scheme != via[0].URL.Scheme {
		return fault.New(fault.Invalid, "it redirects elsewhere")
	}
	return nil
}}

// errNothing is what a place answers that has no such thing.
var errNothing = errors.New("not found")

// get fetches an address, again for a while where nobody answers.
func (p *Places) get(ctx context.Context, method, address string, header map[string]string) ([]byte, error) {
	var last error
	for wait := 500 * time.Millisecond; wait < 8*time.Second; wait *= 2 {
		b, err := once(ctx, method, address, header)
		if err == nil || errors.Is(err, errNothing) || fault.Is(err, fault.Invalid) {
			return b, err
		}
		last = err
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
	return nil, last
}

func once(ctx context.Context, method, address string, header map[string]string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return nil, fault.As(fault.Invalid, err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxDocument+1))
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode == http.StatusNotFound:
		return nil, errNothing
	case res.StatusCode >= 500 || res.StatusCode == http.StatusTooManyRequests:
		return nil, fmt.Errorf("the server answers %s", res.Status)
	case res.StatusCode >= 300:
		return nil, fault.New(fault.Invalid, "the server answers %s", res.Status)
	case len(b) > maxDocument:
		return nil, fault.New(fault.Invalid, "the document is larger than %d bytes", maxDocument)
	}
	return b, nil
}
