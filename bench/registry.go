package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"

	"encoding/json"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// serveImages serves images of 5 layers and 300 MB each, 3,000 files in all, half
// of it text that compresses well, as HOST/big:0 and so on. No two share a layer.
func serveImages(ctx context.Context, dir string, n int) (host string, stop func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	srv := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)))}
	go func() { _ = srv.Serve(ln) }()
	host = ln.Addr().String()
	for i := range n {
		img := v1.Image(empty.Image)
		for l := range 5 {
			data, err := layerTar(uint64(i*5 + l))
			if err != nil {
				return "", nil, err
			}
			layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
			if err != nil {
				return "", nil, err
			}
			if img, err = mutate.AppendLayers(img, layer); err != nil {
				return "", nil, err
			}
		}
		ref, err := name.NewTag(fmt.Sprintf("%s/big:%d", host, i), name.Insecure)
		if err != nil {
			return "", nil, err
		}
		if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
			return "", nil, err
		}
	}
	return host, func() { _ = srv.Close() }, nil
}

// layerTar makes the same gzipped tar for the same seed.
func layerTar(seed uint64) ([]byte, error) {
	var buf bytes.Buffer
	gz, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(gz)
	rng := rand.New(rand.NewPCG(seed, 7))
	words, err := json.Marshal(map[string]string{"a": "the quick brown fox", "b": "jumps over the lazy dog"})
	if err != nil {
		return nil, err
	}
	const files, size = 600, 100 << 10
	data := make([]byte, size)
	for i := range files {
		for j := 0; j < size/2; j += 8 {
			v := rng.Uint64()
			for k := range 8 {
				data[j+k] = byte(v >> (8 * k))
			}
		}
		for j := size / 2; j < size; j++ {
			data[j] = words[j%len(words)]
		}
		h := &tar.Header{Name: fmt.Sprintf("usr/share/l%d/d%d/f%d", seed, i/50, i), Mode: 0o644, Size: size, Typeflag: tar.TypeReg}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(data); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	if err := gz.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// gbits reads the received rate out of iperf3's JSON report.
func gbits(out string) float64 {
	var r struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return 0
	}
	return r.End.Received.Rate / 1e9
}
