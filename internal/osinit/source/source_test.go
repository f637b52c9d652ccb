package source

import (
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const doc = "#cloudos\nversion: 1\n"

// clouds answers as the metadata services do.
func clouds(t *testing.T) *httptest.Server {
	mux := http.NewServeMux()
	header := func(name, want string, h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get(name) != want {
				http.Error(w, "who are you", http.StatusUnauthorized)
				return
			}
			h(w, r)
		}
	}
	say := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(s)) }
	}
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") == "" {
			http.Error(w, "no ttl", http.StatusBadRequest)
			return
		}
		w.Write([]byte("secret"))
	})
	mux.HandleFunc("GET /latest/user-data", header("X-aws-ec2-metadata-token", "secret", say(doc)))
	mux.HandleFunc("GET /latest/meta-data/hostname", header("X-aws-ec2-metadata-token", "secret", say("aws-host")))
	mux.HandleFunc("GET /computeMetadata/v1/instance/attributes/user-data", header("Metadata-Flavor", "Google", say(doc)))
	mux.HandleFunc("GET /computeMetadata/v1/instance/hostname", header("Metadata-Flavor", "Google", say("gcp-host")))
	mux.HandleFunc("GET /metadata/instance/compute/userData", header("Metadata", "true", say(base64.StdEncoding.EncodeToString([]byte(doc)))))
	mux.HandleFunc("GET /metadata/instance/compute/name", header("Metadata", "true", say("azure-host")))
	mux.HandleFunc("GET /metadata/v1/user-data", say("#!/bin/sh\nrm -rf /\n"))
	mux.HandleFunc("GET /metadata/v1/hostname", say("do-host"))
	mux.HandleFunc("GET /doc", say(doc))
	mux.HandleFunc("GET /elsewhere", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
	})
	mux.HandleFunc("GET /big", say(strings.Repeat("x", maxDocument+1)))
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func TestFind(t *testing.T) {
	s := clouds(t)
	online := make(chan struct{})
	close(online)
	disk := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(disk, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	volume := func() ([]byte, []byte, error) { return []byte(doc), []byte("local-hostname: vol\n"), nil }
	for name, c := range map[string]struct {
		p              Places
		source, host   string
		document, fail bool
	}{
		"nothing":         {p: Places{}},
		"command line":    {p: Places{CommandLine: "base64:" + base64.StdEncoding.EncodeToString([]byte(doc)), Disk: disk}, source: "cmdline", document: true},
		"no base64":       {p: Places{CommandLine: "base64:%%%"}, source: "cmdline", fail: true},
		"no address":      {p: Places{CommandLine: "file:///etc/passwd"}, source: "cmdline", fail: true},
		"address":         {p: Places{CommandLine: s.URL + "/doc"}, source: "cmdline", document: true},
		"redirected":      {p: Places{CommandLine: s.URL + "/elsewhere"}, source: "cmdline", fail: true},
		"too big":         {p: Places{CommandLine: s.URL + "/big"}, source: "cmdline", fail: true},
		"disk":            {p: Places{Disk: disk, Volumes: volume}, source: "disk", document: true},
		"volume":          {p: Places{Disk: disk + "x", Volumes: volume}, source: "nocloud", host: "vol", document: true},
		"aws":             {p: Places{Vendor: "Amazon EC2"}, source: "aws", host: "aws-host", document: true},
		"gcp":             {p: Places{Vendor: "Google", Product: "Google Compute Engine"}, source: "gcp", host: "gcp-host", document: true},
		"chromebook":      {p: Places{Vendor: "Google", Product: "Kohaku"}},
		"hyper-v":         {p: Places{Vendor: "Microsoft Corporation", Product: "Virtual Machine", Asset: "1234-5678-9012-3456-7890-1234-56"}},
		"azure":           {p: Places{Vendor: "Microsoft Corporation", Product: "Virtual Machine", Asset: "7783-7084-3265-9085-8269-3286-77"}, source: "azure", host: "azure-host", document: true},
		"surface":         {p: Places{Vendor: "Microsoft Corporation", Product: "Surface"}},
		"digitalocean":    {p: Places{Vendor: "DigitalOcean"}, host: "do-host"},
		"image":           {p: Places{Image: disk, Disk: disk + "x", Volumes: func() ([]byte, []byte, error) { return nil, nil, nil }}, source: "image", document: true},
		"image, named":    {p: Places{Image: disk, Vendor: "DigitalOcean"}, source: "image", host: "do-host", document: true},
		"image last":      {p: Places{Image: disk, Vendor: "Amazon EC2"}, source: "aws", host: "aws-host", document: true},
		"image without":   {p: Places{Image: disk + "x"}},
		"image broken":    {p: Places{Image: filepath.Dir(disk)}, source: "image", fail: true},
		"disk before aws": {p: Places{Vendor: "Amazon EC2", Disk: disk}, source: "disk", document: true},
	} {
		t.Run(name, func(t *testing.T) {
			c.p.Endpoint, c.p.Online, c.p.Log = s.URL, online, t.Logf
			f, err := c.p.Find(t.Context())
			if (err != nil) != c.fail || f.Source != c.source || f.Hostname != c.host || (len(f.Document) > 0) != c.document {
				t.Fatalf("%+v, %v", f, err)
			}
			// The command line, the disk and the image are measured, or sealed to what is.
			inside := f.Source == "disk" || f.Source == "image" || f.Source == "cmdline" && !strings.HasPrefix(c.p.CommandLine, "http:")
			if f.Outside != (c.document && !inside) {
				t.Fatalf("from %s: outside %v", f.Source, f.Outside)
			}
		})
	}
}
