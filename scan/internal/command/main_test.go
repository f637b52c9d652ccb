package command

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v6 "github.com/anchore/grype/grype/db/v6"

	"github.com/cloudos-io/cloudos/scan/internal/sandbox"
	"github.com/cloudos-io/cloudos/scan/internal/stage"
)

var update = flag.Bool("update", false, "write golden files")

// TestMain lets the test program be a stage, as servin-scan is.
func TestMain(m *testing.M) {
	switch name := sandbox.Stage(); name {
	case "":
		os.Exit(m.Run())
	case "burglar":
		sandbox.Exit(burglar())
	default:
		sandbox.Exit(stage.Run(context.Background(), name, "test", os.Args[1:]))
	}
}

// burglar tries what a taken-over parser would.
func burglar() error {
	in, err := sandbox.Enter()
	if err != nil {
		return err
	}
	var got []string
	for _, p := range []string{"/etc/passwd", "/proc/self/status", "/proc/1/environ", "/root", "/bin/sh", "/dev/sda"} {
		if _, err := os.Stat(p); err == nil {
			got = append(got, "sees "+p)
		}
	}
	if c, err := net.Dial("tcp", "127.0.0.1:22"); !errors.Is(err, os.ErrPermission) {
		got = append(got, fmt.Sprint("may open sockets: ", c, err))
	}
	self, _ := os.Executable()
	for _, p := range []string{"/bin/true", self, in.Scratch + "/x"} {
		_ = os.WriteFile(in.Scratch+"/x", []byte("#!/bin/true\n"), 0o755)
		if err := exec.Command(p).Start(); err == nil {
			got = append(got, "executes "+p)
		}
	}
	if err := os.WriteFile("/x", nil, 0o600); err == nil {
		got = append(got, "writes to its root")
	}
	if in.Database != "" {
		if _, err := os.ReadFile(in.Database); err != nil {
			got = append(got, "cannot read its database: "+err.Error())
		}
		if f, err := os.OpenFile(in.Database, os.O_WRONLY, 0); err == nil {
			f.Close()
			got = append(got, "writes to its database")
		}
	}
	if os.Geteuid() == 0 && os.Getenv("SERVIN_TEST_ROOT") != "" {
		got = append(got, "is root")
	}
	ents, _ := os.ReadDir("/")
	var names []string
	for _, e := range ents {
		names = append(names, e.Name())
	}
	fmt.Printf("root: %s\n%s", strings.Join(names, " "), strings.Join(got, "\n"))
	return nil
}

// file is an entry of a layer.
type file struct {
	name, text, link string
	size             int64 // of zeros, instead of text
}

// layer makes a compressed layer.
func layer(t testing.TB, files ...file) (blob []byte, diff string) {
	t.Helper()
	var buf bytes.Buffer
	z, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	tw := tar.NewWriter(multi{z, h})
	zeros := make([]byte, 1<<20)
	for _, f := range files {
		hdr := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.text)) + f.size}
		if f.link != "" {
			hdr.Typeflag, hdr.Linkname, hdr.Size = tar.TypeSymlink, f.link, 0
		}
		if err := tw.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(f.text)); err != nil && f.link == "" {
			t.Fatal(err)
		}
		for left := f.size; left > 0; left -= int64(len(zeros)) {
			if _, err := tw.Write(zeros[:min(left, int64(len(zeros)))]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(tw.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), "sha256:" + hex.EncodeToString(h.Sum(nil))
}

type multi [2]interface{ Write([]byte) (int, error) }

func (m multi) Write(p []byte) (int, error) {
	if _, err := m[0].Write(p); err != nil {
		return 0, err
	}
	return m[1].Write(p)
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(s[:])
}

// saved makes the tar that the engine saves an image as; spoil may change its parts.
func saved(t testing.TB, layers [][]file, spoil func(files map[string][]byte)) []byte {
	t.Helper()
	blobs := map[string][]byte{}
	put := func(kind string, b []byte) map[string]any {
		blobs["blobs/sha256/"+strings.TrimPrefix(sum(b), "sha256:")] = b
		return map[string]any{"mediaType": kind, "digest": sum(b), "size": len(b)}
	}
	js := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var list []any
	var diffs []string
	for _, l := range layers {
		b, d := layer(t, l...)
		list, diffs = append(list, put("application/vnd.oci.image.layer.v1.tar+gzip", b)), append(diffs, d)
	}
	conf := put("application/vnd.oci.image.config.v1+json", js(map[string]any{"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": diffs}}))
	m := put("application/vnd.oci.image.manifest.v1+json", js(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": conf, "layers": list}))
	blobs["index.json"] = js(map[string]any{"schemaVersion": 2, "manifests": []any{m}})
	blobs["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	if spoil != nil {
		spoil(blobs)
	}
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for n, b := range blobs {
		if err := tw.WriteHeader(&tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

const osRelease = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n"

func dpkg(name, version string) string {
	return "Package: " + name + "\nStatus: install ok installed\nArchitecture: amd64\nVersion: " + version + "\nMaintainer: A <a@example.com>\nDescription: x\n\n"
}

// database makes one with two vulnerabilities of packages of Debian 12 and one of an
// npm package, in grype's schema, as archives of it are published: without indexes.
func database(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w, err := v6.NewWriter(v6.Config{DBDirPath: dir, CacheSizeKiB: 8192})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.SetDBMetadata(); err != nil {
		t.Fatal(err)
	}
	debian := &v6.OperatingSystem{Name: "debian", ReleaseID: "debian", MajorVersion: "12", Codename: "bookworm"}
	add := func(provider, id, severity, ecosystem, pkg, constraint, kind, fixed string, os *v6.OperatingSystem) {
		p := &v6.Provider{ID: provider, Version: "1", Processor: "test"}
		v := &v6.VulnerabilityHandle{Name: id, Status: v6.VulnerabilityActive, Provider: p, BlobValue: &v6.VulnerabilityBlob{
			ID: id, Description: "made for a test", Severities: []v6.Severity{{Scheme: v6.SeveritySchemeCHMLN, Value: severity}},
		}}
		if err := w.AddVulnerabilities(v); err != nil {
			t.Fatal(err)
		}
		fix := &v6.Fix{Version: fixed, State: v6.FixedStatus}
		if fixed == "" {
			fix.State = v6.NotFixedStatus
		}
		if err := w.AddAffectedPackages(&v6.AffectedPackageHandle{
			Vulnerability: v, OperatingSystem: os, Package: &v6.Package{Ecosystem: ecosystem, Name: pkg},
			BlobValue: &v6.PackageBlob{Ranges: []v6.Range{{Version: v6.Version{Type: kind, Constraint: constraint}, Fix: fix}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	add("debian", "CVE-2099-0001", "high", "deb", "openssl", "< 3.0.13-1~deb12u1", "dpkg", "3.0.13-1~deb12u1", debian)
	add("debian", "CVE-2099-0002", "low", "deb", "zlib", "< 2", "dpkg", "", debian)
	add("github", "GHSA-2099-test-0003", "critical", "npm", "left-pad", "< 1.3.1", "semantic", "1.3.1", nil)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, v6.VulnerabilityDBFileName)
}

// archive packs a database as published ones are.
func archive(t testing.TB, db string) []byte {
	t.Helper()
	b, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	tw := tar.NewWriter(z)
	err = tw.WriteHeader(&tar.Header{Name: "./" + v6.VulnerabilityDBFileName, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))})
	_, werr := tw.Write(b)
	if err := errors.Join(err, werr, tw.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// run runs a command.
func run(t testing.TB, in []byte, args ...string) (code int, out, said string) {
	t.Helper()
	var o, e bytes.Buffer
	err := Run(t.Context(), "test", args, bytes.NewReader(in), &o, &e)
	if err != nil {
		e.WriteString(err.Error())
	}
	return ExitCode(err), o.String(), e.String()
}
